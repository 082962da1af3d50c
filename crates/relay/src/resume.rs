//! Resume rules.
