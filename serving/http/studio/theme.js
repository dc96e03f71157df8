/* Runs before anything is painted: light, dark, or what the system says. Not a module, so that it is not deferred. */
(() => {
  const KEY = "dreamfleet.theme";
  const read = () => {
    try {
      return localStorage.getItem(KEY) || "auto";
    } catch {
      return "auto";
    }
  };
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  window.theme = {
    get: read,
    set(theme) {
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        /* kept for this page only */
      }
      show(theme);
      dispatchEvent(new Event("theme"));
    },
  };
  show(read());
})();
