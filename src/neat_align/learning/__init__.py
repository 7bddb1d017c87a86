"""Learning: from groups of completions to one optimizer step.

losses.py         the losses, as pure functions of tensors
distillation.py   contrast distillation: the divergence from a teacher, token by token
teacher_rows.py   the rows that the teacher reads
pairs.py          which completions are compared, and how well the policy orders them
objective.py      the weighted sum of losses, divided by counts over the whole step
batches.py        groups as tensors: rows for the model, and tables that rank them
current_round.py  the groups that are being learned from, as Trainer's data set
step_engine.py    micro-batches under a token budget, forward and backward, out of memory
step_facts.py     what a micro-batch says of the step, on the device
step_metrics.py   training metrics between two log lines, of all ranks
finite.py         losses and gradients that are not finite numbers
alarms.py         warnings that a run is collapsing while its loss improves
"""
