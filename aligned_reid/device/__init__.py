"""The devices a run computes on."""
