"""Published figures, and whether they can be reached here."""
