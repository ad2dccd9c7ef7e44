use std::{sync::Arc, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How a download is shown to whoever waits for it.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    shown: bool,
}

impl Progress {
    /// A bar on stderr; nothing if that is no terminal.
    pub fn on_stderr() -> Self {
        Self { shown: true }
    }

    /// Nothing.
    pub fn silent() -> Self {
        Self { shown: false }
    }

    /// A wait whose length isn't known.
    pub(super) fn spinner(self, what: &str) -> Shown {
        let bar = self.draw(ProgressBar::new_spinner());
        bar.set_style(style("{spinner} {msg} {elapsed}"));
        bar.set_message(what.to_owned());
        if self.shown {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Shown(Arc::new(bar))
    }

    /// A download whose length is told when it starts.
    pub(super) fn download(self) -> Shown {
        let bar = self.draw(ProgressBar::new(0));
        bar.set_style(style("{msg:30} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"));
        Shown(Arc::new(bar))
    }

    fn draw(self, bar: ProgressBar) -> ProgressBar {
        if !self.shown {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar
    }
}

fn style(template: &'static str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates above are well formed")
}

/// One line on the terminal, cleared when dropped.
#[derive(Clone)]
pub(super) struct Shown(Arc<ProgressBar>);

impl hf_hub::api::Progress for Shown {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.set_message(filename.to_owned());
        self.0.set_length(size as u64);
        self.0.reset();
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {}
}

impl Drop for Shown {
    fn drop(&mut self) {
        if Arc::strong_count(&self.0) == 1 {
            self.0.finish_and_clear();
        }
    }
}
