"""From records to what people and machines read: results.json, the terminal report, JUnit XML."""
