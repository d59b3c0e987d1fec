"""What one namespace may keep (`quotas`) and how often one caller may ask (`rates`)."""
