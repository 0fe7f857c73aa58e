"""What numbers of devices mean: samples, rates between them, and the forms they are given out in. Pure."""
