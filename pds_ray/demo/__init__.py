"""The built-in world: its models' weights, and the scripts that train them."""
