"""Why an int8 model loses accuracy: errors by site, sensitivity, accuracy control."""
