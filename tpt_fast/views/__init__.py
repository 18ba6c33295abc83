"""Pictures in, normalised views out: ``decode`` a picture, draw its ``crops``, ``make`` the views."""
