"""What clients of AUTOMATIC1111's API call, in its own words; what is not done is refused by name."""
