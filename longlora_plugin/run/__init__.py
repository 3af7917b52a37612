"""From a recipe to the decisions of one run."""
