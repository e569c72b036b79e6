"""Runs work in this process or over Ray, and carries its log lines, figures and collectives."""
