"""What looks at models: inspection, comparison, verification, bench and demo."""
