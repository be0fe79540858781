//! How much was tried belongs into the output of every run: it is not captured, as what passing
//! tests print otherwise is.

use std::fmt;
use std::io::{self, Write};

pub fn tell(what: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{what}");
}
