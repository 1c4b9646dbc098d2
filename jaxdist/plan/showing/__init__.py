"""Plans for people: as text, and as one page with its drawings."""
