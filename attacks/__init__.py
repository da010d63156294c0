"""Recovery attacks, one file each; ``base`` holds the contract."""

#: Modules of this package that are not attacks; every other file is one, named after its file.
SUPPORT_MODULES = frozenset(
    {
        "base",
        "block_tridiagonal",
        "checkpoint",
        "descent",
        "eigenfaces",
        "encoder",
        "exposure",
        "gaussian_prior",
        "generator",
        "inversion",
        "inversion_losses",
        "layout",
        "places",
        "plateau",
        "posterior",
        "schedule",
        "seeds",
        "ssim",
        "state_reader",
        "unet_network",
        "widths",
    }
)
