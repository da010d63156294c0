"""Recovery and linkage attacks, one file each; ``base`` holds the contract, ``parts`` what several share."""

#: Modules of this package that are not attacks; every other file is one, named after its file.
SUPPORT_MODULES = frozenset({"base", "parts"})
