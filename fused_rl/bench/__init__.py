"""The benchmark: tasks, providers, clocks, records, figures."""
