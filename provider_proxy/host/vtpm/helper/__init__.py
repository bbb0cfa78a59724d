"""provider-proxy-vtpm: looks, with root's eyes, at which vTPM runs here and what EKs it holds."""
