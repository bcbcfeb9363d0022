"""The factors nearest to a given weight, in closed form or by alternating least squares."""
