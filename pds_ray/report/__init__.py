"""What is made to be looked at."""
