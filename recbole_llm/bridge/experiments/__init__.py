"""Several trainings on one split: a training in a process of its own, comparison, hyper-parameter search, significance."""
