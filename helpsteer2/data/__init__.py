"""Groups of scored responses: reading, checking, tokenising, planning and packing them."""
