// What scrolls sideways can be reached by the keyboard. The theme does this for code; here are tables, drawings, formulas.
const WIDE = ".md-typeset__scrollwrap, .md-typeset p:has(> .drawing), .formula";

function reach() {
  for (const part of document.querySelectorAll(WIDE)) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}

document$.subscribe(() => requestAnimationFrame(reach));
addEventListener("resize", reach);
