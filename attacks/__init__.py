"""Recovery attacks, one file each; ``base`` holds the contract."""

#: Modules of this package that are not attacks; every other file is one, named after its file.
SUPPORT_MODULES = frozenset(
    {"base", "checkpoint", "exposure", "layout", "plateau", "schedule", "seeds", "ssim", "state_inference"}
)
