"""The interfaces of other libraries, on ours."""
