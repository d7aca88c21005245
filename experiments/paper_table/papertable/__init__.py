"""The paper's table: tasks, models, training, measures and pages."""
