"""Learning: losses as pure functions, the loss of an optimizer step, the step itself, alarms."""
