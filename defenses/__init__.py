"""Client-side defences, one file each; ``base`` holds the contract, ``frequency`` the shared operator,
``compose`` chains of them, ``template`` what template defences add."""

#: Modules of this package that are not defences; every other file is one, named after its file.
SUPPORT_MODULES = frozenset(
    {"base", "client", "compose", "draws", "frequency", "fused", "layout", "linear", "ranks", "template"}
)
