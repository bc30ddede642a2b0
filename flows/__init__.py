"""Floor 3: the stages as Prefect tasks in dependency order, the run's config tree and the command
line.
"""
