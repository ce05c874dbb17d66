"""Settings, logging and the model catalogue: what every process reads once at start-up."""
