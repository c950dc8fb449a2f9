"""The SAE route (reference section 6): `route` has its steps. Nothing here reads provenance."""
