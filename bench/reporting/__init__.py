"""What results say: records, statistics, tables and plots."""
