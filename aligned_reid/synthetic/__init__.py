"""The pictures of the generated data set: who walks there, in which pose, where, and before which camera."""
