"""Which tokens stay: numbers in, a choice out. Knows neither models nor files."""
