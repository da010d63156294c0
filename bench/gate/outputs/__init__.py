"""What other programs read of a gate's report: JUnit XML, GitHub annotations and step summary."""
