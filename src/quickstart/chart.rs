//! The curve of reward and loss, as SVG and PNG, with a font that travels in the binary.

use std::{path::Path, sync::Once};

use plotters::{
    coord::Shift,
    prelude::*,
    style::{FontStyle, register_font},
};

use super::StepMetrics;

/// Size of the picture in pixels.
const SIZE: (u32, u32) = (960, 540);

/// Name under which the embedded font is known to plotters.
const FONT: &str = "sans-serif";

/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito).
const REWARD: RGBColor = RGBColor(0, 114, 178);
const LOSS: RGBColor = RGBColor(213, 94, 0);
const AXIS: RGBColor = RGBColor(90, 90, 90);

/// Why the chart can't be drawn.
#[derive(Debug, thiserror::Error)]
#[error("can't draw {file}: {reason}")]
pub struct ChartError {
    file: String,
    reason: String,
}

/// Draws `curve.svg` and `curve.png` of a run into `directory`.
pub fn draw(steps: &[StepMetrics], title: &str, directory: &Path) -> Result<(), ChartError> {
    static FONT_REGISTERED: Once = Once::new();
    FONT_REGISTERED.call_once(|| {
        // Fails only for bytes that are no font; the text would then be missing.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let svg = directory.join("curve.svg");
    plot(SVGBackend::new(&svg, SIZE).into_drawing_area(), steps, title)
        .map_err(|e| failed("curve.svg", e))?;
    let png = directory.join("curve.png");
    plot(BitMapBackend::new(&png, SIZE).into_drawing_area(), steps, title).map_err(|e| failed("curve.png", e))
}

fn failed(file: &str, error: impl std::fmt::Display) -> ChartError {
    ChartError { file: file.into(), reason: error.to_string() }
}

type Failure<B> = DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>;

/// Reward on the left axis (0 to 1), loss per trained token group on the right.
fn plot<B: DrawingBackend>(
    area: DrawingArea<B, Shift>,
    steps: &[StepMetrics],
    title: &str,
) -> Result<(), Failure<B>> {
    area.fill(&WHITE)?;
    let last = steps.len().max(2) as f64;
    let losses: Vec<(f64, f64)> = steps.iter().filter_map(|s| Some((f64::from(s.step), s.loss?))).collect();
    let (low, high) = losses.iter().fold((0.0f64, 0.0f64), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
    let margin = ((high - low) * 0.08).max(0.1);

    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 22))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .right_y_label_area_size(64)
        .build_cartesian_2d(1.0..last, 0.0..1.05)?
        .set_secondary_coord(1.0..last, (low - margin)..(high + margin));
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("mean reward")
        .x_labels(steps.len().clamp(2, 17))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.1}"))
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16).into_font().color(&REWARD))
        .axis_style(AXIS)
        .light_line_style(WHITE)
        .draw()?;
    chart
        .configure_secondary_axes()
        .y_desc("loss (sum over the batch)")
        .y_label_formatter(&|y| format!("{y:.1}"))
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16).into_font().color(&LOSS))
        .draw()?;

    chart
        .draw_secondary_series(LineSeries::new(losses.iter().copied(), LOSS.stroke_width(1)))?
        .label("loss")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], LOSS.stroke_width(2)));
    let rewards = || steps.iter().map(|s| (f64::from(s.step), s.reward));
    chart
        .draw_series(LineSeries::new(mean_of_three(steps), REWARD.stroke_width(3)))?
        .label("reward, mean of three steps")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], REWARD.stroke_width(3)));
    chart
        .draw_series(rewards().map(|point| Circle::new(point, 4, REWARD.mix(0.45).filled())))?
        .label("reward of one step")
        .legend(|(x, y)| Circle::new((x + 9, y), 4, REWARD.mix(0.45).filled()));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.85))
        .border_style(AXIS.mix(0.4))
        .label_font((FONT, 15))
        .draw()?;
    area.present()
}

/// Each step's reward averaged with its neighbours: one batch of 32 replies has a noise of
/// about 0.1.
fn mean_of_three(steps: &[StepMetrics]) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let window = &steps[i.saturating_sub(1)..(i + 2).min(steps.len())];
        window.iter().map(|s| s.reward).sum::<f64>() / window.len() as f64
    };
    (0..steps.len()).map(|i| (f64::from(steps[i].step), mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pictures_hold_the_curve_and_its_text() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let step = |step: u32| StepMetrics {
            step,
            policy_version: u64::from(step) - 1,
            reward: f64::from(step) / 10.0,
            loss: (step > 2).then_some(f64::from(step) - 4.0),
            kl: None,
            tokens_per_s: 100.0,
            sampled_tokens: 300,
            trained_tokens: 800,
            groups_with_signal: 3,
            learning_rate: 1e-3,
            seconds: 2.0,
        };
        let steps: Vec<_> = (1..=8).map(step).collect();
        draw(&steps, "a title", directory.path()).expect("both are drawn");
        let svg = std::fs::read_to_string(directory.path().join("curve.svg")).expect("written");
        for text in ["a title", "mean reward", "reward of one step", "<polyline", "<circle"] {
            assert!(svg.contains(text), "no {text:?} in the SVG");
        }
        let png = std::fs::read(directory.path().join("curve.png")).expect("written");
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
        assert!(png.len() > 10_000, "a picture with text, not {} bytes of white", png.len());
        // A run without any step is drawn as well.
        draw(&[], "nothing", directory.path()).expect("an empty chart");
    }
}
