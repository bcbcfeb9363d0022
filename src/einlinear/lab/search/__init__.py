"""Looking for better structures: what may be tried, in which order, and what is told of the winners."""
