"""What is asked for: recipes, parameters and options, checked as far as no model is needed."""
