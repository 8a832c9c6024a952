"""Adapters and models in files: formats, fingerprints, merges, audits."""
