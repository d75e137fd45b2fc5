"""Whether the class map is right, asked of a teacher and the pictures."""
