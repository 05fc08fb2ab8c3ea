"""Why an int8 model loses accuracy: errors and sensitivity by site, and what they advise."""
