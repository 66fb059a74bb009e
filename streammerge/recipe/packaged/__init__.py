"""Recipes that come with the package: YAML files whose `inputs` the command line binds to files."""
