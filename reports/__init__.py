"""Tables and figures made from results; reads result files and runs nothing."""
