"""Whether FP8 layers compute in FP8 at present: after steps that were not finite a run goes on in bf16 for a while."""


class Fp8Switch:
    """One switch for all FP8 layers of the process."""

    def __init__(self) -> None:
        """Begin in FP8."""
        self.is_on = True


switch = Fp8Switch()
