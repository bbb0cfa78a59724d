"""provider-proxy-vtpm: sees which vTPMs run here and which EKs they hold; may read root's files."""
