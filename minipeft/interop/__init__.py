"""Files that others load, and what they do: formats, fingerprints, merges, audits."""
