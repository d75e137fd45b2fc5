"""What the detection trainer is made of: its command line, its data, what supervises it, and how it is resumed."""
