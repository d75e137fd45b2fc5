"""What people look at: overlays of what the selector sees, and the gallery of a set."""
