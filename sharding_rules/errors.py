"""The one error of planning."""


class PlanError(ValueError):
    """A plan that cannot be carried out: the message names the parameter, the dimension, the sizes and what would
    work.
    """
