"""What runs work: here or over Ray, with its log lines and collectives."""
