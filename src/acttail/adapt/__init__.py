"""A short self-distillation of a sparse model towards its own dense self; see :func:`acttail.adapt.run.adapt`."""
